"""The protocols: OpenAI's HTTP API and TorchServe's gRPC service."""
