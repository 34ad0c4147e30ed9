"""The weights of timm's that ours start from, and the accuracies timm publishes for them.

The tables are in `weights/*_sources.csv`: a row for each source and image size. The figures are timm's own results on
the ImageNet-1k validation set; a model of ours computes what its source does, so they hold for it before any training.
"""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

TABLE = 'timm_senetv2/weights/{}'  # where a reader of the repository finds a table


class Published(NamedTuple):
    """Accuracy of a source at one image size, in %."""

    img_size: int
    top1: float
    top5: float


class Source(NamedTuple):
    """A source on the Hub: which model of ours starts from it, and its accuracy by image size, the best first."""

    hub_id: str
    model: str
    table: str
    license: str | None
    accuracies: tuple[Published, ...]

    @property
    def datasets(self) -> list[str]:
        """The data sets on the Hub that it was trained on, by timm's tags: ImageNet-1k at last, ImageNet-12k before.

        Some tags (`fb_swsl_ig1b`, `fb_ssl_yfcc100m`) saw images before that are no data set there.
        """
        more = ['timm/imagenet-12k-wds'] if 'in12k' in self.hub_id.partition('.')[2].split('_') else []
        return ['imagenet-1k', *more]


@cache
def sources() -> dict[str, Source]:
    """Every source, by its id on the Hub."""
    found: dict[str, Source] = {}
    for path in sorted(files(__package__).joinpath('weights').iterdir(), key=lambda path: path.name):
        if not path.name.endswith('_sources.csv'):
            continue
        for row in csv.DictReader(path.read_text(encoding='utf-8').splitlines()):
            hub_id = row['source_on_the_hub']
            source = found.get(hub_id) or Source(hub_id, row['model'], TABLE.format(path.name), row.get('license'), ())
            figure = Published(int(row['img_size']), float(row['top1']), float(row['top5']))
            accuracies = sorted((*source.accuracies, figure), key=lambda a: a.top1, reverse=True)
            found[hub_id] = source._replace(accuracies=tuple(accuracies))
    return found
