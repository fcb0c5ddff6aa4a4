"""From somebody's ratings to a model file that streams like them."""
