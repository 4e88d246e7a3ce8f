from ft_core.plugins import API_VERSION, CommandSpec, ExporterSpec

FUTURE = CommandSpec(name="future", summary="from the future", module="ft_broken.sound", api_version=API_VERSION + 1)
TRAIN = CommandSpec(name="train", summary="not the train you know", module="ft_broken.sound")
SOUND = CommandSpec(name="sound", summary="works, beside all that does not", module="ft_broken.sound")
TOY = ExporterSpec(name="toy", summary="another toy", export="ft_broken.nowhere:export")
NOTHING = "no spec at all"
