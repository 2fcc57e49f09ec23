"""The routes: each parses, submits and formats. ``server.app`` holds the table."""
