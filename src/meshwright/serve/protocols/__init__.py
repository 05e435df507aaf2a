"""The protocols of clients: HTTP as OpenAI's clients do, gRPC as TorchServe's clients do."""
