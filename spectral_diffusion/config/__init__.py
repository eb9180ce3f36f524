"""The settings of every verb, shared by YAML files, the command line, the app and Python."""
