"""The model behind the protocols: its process, the channel to it, and the chat template."""
