"""HTTP: one file per API over engine/async_engine.py. README.md has the routes and the rules they keep."""
