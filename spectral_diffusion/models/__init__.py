"""Bases and what runs them: loading, fingerprints, tokens, prompt encoding, the autoencoder, target layers."""
