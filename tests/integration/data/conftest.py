from tests.unit.data.conftest import digits

__all__ = ["digits"]
