"""ADE20K scene parsing (Zhou et al., CVPR 2017), the 150 classes of the MIT scene parsing challenge 2016."""

from __future__ import annotations

from bidensify.data.base import DataInfo, Transforms
from bidensify.data.filedata import FileDataset
from bidensify.data.readers import MaskReader
from bidensify.data.registry import register_data_set
from bidensify.data.sets.places import check_split, colours, fewer, locate, paired

PUBLISHED = {"train": 20210, "val": 2000}
_FOLDERS = {"train": "training", "val": "validation"}
_GET = (
    "download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip, unzip it, and give the folder "
    "ADEChallengeData2016 as root"
)
_NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
)
_COLOURS = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307"
    "cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ff"
    "ff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff4700"
    "00ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ff"
    "adff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff"
    "007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff"
    "70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ffffff00"
    "0099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff"
)


@register_data_set("ade20k")
class Ade20k(FileDataset):
    """ADE20K (ADEChallengeData2016): 150 classes of indoor and outdoor scenes.

    Reads ``{images,annotations}/{training,validation}``. Labels 1 to 150 become classes 0 to 149; label 0, other things,
    is ignored (255).

    Args:
        split: ``train`` (20,210 images) or ``val`` (2,000).
        root: the folder ADEChallengeData2016, or the one that holds it.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: there is no such split.
        DataError: a folder is missing or files do not pair up.

    Example:
        ::

            train: {name: ade20k, split: train, root: /data/ADEChallengeData2016, cache: false}
    """

    def __init__(self, split: str, *, root: str, cache: bool = False, transforms: Transforms | None = None) -> None:
        check_split("ADE20K", split, PUBLISHED)
        folder = _FOLDERS[split]
        needed = [f"images/{folder}", f"annotations/{folder}"]
        base = locate("ADE20K", root, ["ADEChallengeData2016"], needed, _GET)
        names = tuple(_NAMES.split(", "))
        info = DataInfo(num_classes=150, class_names=names, palette=colours(_COLOURS))
        reader = MaskReader(150, label_map={0: 255, **{label: label - 1 for label in range(1, 151)}})
        items = paired(base / needed[0], base / needed[1])
        super().__init__(items, info, masks=reader, cache=cache, transforms=transforms)
        self.notes = fewer("ADE20K", split, len(items), PUBLISHED)
