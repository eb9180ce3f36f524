"""Pictures: prompts, adapters, sketches, settings embedded in the PNG."""
