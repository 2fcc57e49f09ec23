"""The wire: what a request's JSON may hold, and how it becomes a checked Python value."""
