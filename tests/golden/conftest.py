from made_run import prepared

__all__ = ["prepared"]
