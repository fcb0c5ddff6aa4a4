"""The part of the page where another stream is put together: controls made from the settings model, a preview, what starts it."""
