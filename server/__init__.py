"""The package of the OpenAI-compatible HTTP server."""
