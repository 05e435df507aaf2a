"""The model behind the wires: its process, the channel to it, and the chat template."""
