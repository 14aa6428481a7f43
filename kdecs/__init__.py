"""kdecs: emotion-cause extraction in dialogues by distillation (the method KD-ECS)."""

__version__ = "0.1.0"
