#!/usr/bin/env python
"""Print the table of the tags with lifted weights, in Markdown: the tag, its source, the source's accuracy.

The accuracies are not ours: timm's results on the ImageNet-1k validation set for the source, as of the file
results/lift_sources.csv. A lifted model computes what its source does, so they are its accuracies before any training.

    python scripts/pretrained_table.py
"""

import argparse
import csv
from pathlib import Path

import timm
from _cli import run

SOURCES = Path(__file__).parents[1] / 'results' / 'lift_sources.csv'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with SOURCES.open(newline='') as f:
        rows = list(csv.DictReader(f))
    print('| Tag, bold where it is the default | Source on the Hub | Its top-1, % (pixels) |')
    print('|---|---|---|')
    for source in dict.fromkeys(row['source_on_the_hub'] for row in rows):
        of_source = [row for row in rows if row['source_on_the_hub'] == source]
        model = of_source[0]['model']
        default = timm.models.get_pretrained_cfg(model).hf_hub_id == source
        accuracy = ', '.join(f'{float(row["top1"]):.2f}&nbsp;({row["img_size"]})' for row in of_source)
        name = f'`{model}.se_{source.split(".")[1]}`'
        if default:
            name = f'**{name}**'
        print(f'| {name} | [{source}](https://huggingface.co/{source}) | {accuracy} |')


if __name__ == '__main__':
    run(main)
