"""The messages between agents, ranks, people and the hub: generated from hub.proto."""
