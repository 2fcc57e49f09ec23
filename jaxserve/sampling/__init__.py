"""How the next token is chosen: parameters (no JAX) and the stages that apply them."""
