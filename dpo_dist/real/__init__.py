"""`make real`: a real chat model is aligned on its own answers, which rules rate. The run: __main__.py."""
