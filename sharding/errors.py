"""Errors of meshes, axis rules and collectives. Each message gives the value, the limit and what to do."""


class ShardingError(ValueError):
    """Base of everything that the sharding package refuses."""


class MeshError(ShardingError):
    """A mesh that cannot be built, or that does not fit the model."""


class AxisRuleError(ShardingError):
    """Logical axes that collide on one mesh axis, or an axis without a rule."""


class LaunchError(ShardingError):
    """Processes that cannot be started together: a host, port or name that does not work, or a wrong number of them."""
