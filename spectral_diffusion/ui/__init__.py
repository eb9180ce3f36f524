"""The app in the browser. ``controllers`` is plain Python; only ``app`` knows gradio."""
