"""Train one concept into one adapter."""
