"""How many draft tokens pay: costs, acceptance and the choice. Plain NumPy; ``serving/`` feeds it."""
