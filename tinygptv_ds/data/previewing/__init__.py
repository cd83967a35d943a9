"""The pages of `preview`: samples as the model will see them, as HTML or a picture."""
