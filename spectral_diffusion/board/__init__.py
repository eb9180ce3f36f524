"""The board: any trainer's or merger's result, and any generator, on the same concepts and prompts."""
