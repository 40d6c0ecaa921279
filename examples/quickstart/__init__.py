"""The demo's data set: real handwritten digits over real photographs, with questions that have checkable answers."""
