"""`report.html` of a run, of several side by side, or of a sweep: run_files.py (what is in the folder) → a file for
each section → page.py, one HTML file that needs no network. No torch here, and Plotly's Python part is never imported:
its JavaScript is read from the installed package, and figures are plain dicts."""
