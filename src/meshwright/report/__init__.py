"""Shows plans and runs to people: in the terminal, as timelines, and as one self-contained HTML page."""
