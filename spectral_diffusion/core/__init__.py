"""The ground floor: errors, files, caches, randomness, precision. It knows no model and no method."""
