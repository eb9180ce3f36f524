"""The app in the browser. Only ``app``, ``page`` and ``tabs`` know gradio; everything else is plain Python."""
