"""What a run costs: operations, memory, and the sizes that fit."""
