#!/usr/bin/env python
"""Convert a foreign checkpoint into a directory that timm loads.

Reads the SEANet authors' CIFAR-10 and CIFAR-100 files (https://github.com/akhilesh-pandey/SEANet-pytorch), and files of
unofficial PyTorch ports that store SaE as separate dense layers. The number of classes is that of the file.

    python scripts/convert_checkpoint.py best_model.pth --model seanet20 --out seanet20_cifar10
    python -c "import timm; timm.create_model('local-dir:seanet20_cifar10', pretrained=True)"
"""

import argparse
import difflib
import tempfile
from pathlib import Path

import timm
from _cli import UserError, run
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg_value, save_for_hf
from timm.utils import ParseKwargs

from timm_senetv2.checkpoints import convert_state_dict, read_checkpoint
from timm_senetv2.registration import MODEL_MODULES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='.pth, .pt, .bin or .safetensors file; never unpickled freely')
    parser.add_argument('--model', required=True, help='the model that the weights are of, such as seanet20')
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help='its options where they are not the default, such as aggregation_op=mean',
    )
    parser.add_argument(
        '--out', required=True, type=Path, metavar='DIR', help='new directory for model.safetensors and config.json'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    models = timm.list_models(module=MODEL_MODULES)
    if args.model not in models:
        close = difflib.get_close_matches(args.model, models, n=3)
        raise UserError(
            f'{args.model!r} is not one of our models' + (f'; did you mean {", ".join(close)}?' if close else '')
        )
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f'{args.out} exists; name a new directory')
    try:
        checkpoint = read_checkpoint(args.checkpoint)
    except OSError as e:
        raise UserError(f'cannot read {args.checkpoint}: {e.strerror}') from None
    except ValueError as e:
        raise UserError(str(e)) from None

    classifier = get_pretrained_cfg_value(args.model, 'classifier') + '.weight'
    if classifier not in checkpoint.state_dict:
        raise UserError(f'{args.checkpoint} has no {classifier}, the classifier of {args.model}')
    num_classes = len(checkpoint.state_dict[classifier])
    try:
        model = timm.create_model(
            f'{args.model}.untrained',
            num_classes=num_classes,
            pretrained_cfg_overlay=dict(tag=None),
            **args.model_kwargs,
        )
    except (TypeError, ValueError) as e:
        raise UserError(f'--model-kwargs: {e}') from None
    try:
        model.load_state_dict(convert_state_dict(checkpoint.state_dict, model))
    except (RuntimeError, ValueError) as e:
        raise UserError(f'{args.checkpoint} does not fit {args.model}: {e}') from None

    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out.parent) as temporary:
            save_for_hf(model, temporary + '/model', safe_serialization=True)
            Path(temporary, 'model').rename(args.out)
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write {args.out}: {e}') from None

    print(f'layout: {checkpoint.layout}')
    if checkpoint.epoch is not None:
        print(f'epoch: {checkpoint.epoch}')
    if checkpoint.best_acc1 is not None:
        print(f'best accuracy in the file: {checkpoint.best_acc1:.2f} %')
    print(f'classes: {num_classes}')
    print(f'parameters: {sum(p.numel() for p in model.parameters()):,}')
    print(f"wrote {args.out}; timm.create_model('local-dir:{args.out}', pretrained=True) loads it")


if __name__ == '__main__':
    run(main)
