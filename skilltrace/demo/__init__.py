"""The demo that skilltrace ships: a DSPy program that makes skills, and a model server that answers it offline."""
