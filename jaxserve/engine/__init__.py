"""The brain: which request gets how many tokens this step, and the engine that carries it out."""
