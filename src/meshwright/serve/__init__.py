"""Serves a model over HTTP and gRPC: `server.main(folder, settings)`; `client` has a client of each protocol."""
