"""Llama and its kin: Mistral, Qwen2 and Qwen3."""
