"""For people: scored responses as a table in the terminal and as a page with pictures."""
