"""What the package registers. Nothing is imported but the specs' classes until a plugin is used."""

from ft_core.plugins import CommandSpec, ExporterSpec

HELLO = CommandSpec(name="hello", summary="greet somebody", module="ft_toy.hello")
TOY = ExporterSpec(
    name="toy", summary="a list of the run's files", export="ft_toy.listing:export", types=("plain", "loud")
)
