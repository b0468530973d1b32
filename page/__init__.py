"""The parts of app.py: the settings of a drawing, its run, the page and its server."""
