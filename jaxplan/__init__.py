"""Language agents that learn when to plan: model and world in one compiled program."""
