"""The body: pure functions from arrays to arrays. They know no request and no family name."""
