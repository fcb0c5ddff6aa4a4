"""The latent-factor world: who rates, what is rated, and every rating as a pure function."""
