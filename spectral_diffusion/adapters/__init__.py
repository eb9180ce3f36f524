"""Adapters: the object, putting it on a model through PEFT, and the files that it is written to and read from."""
