"""MindFormers' ``deepseek3_train2infer.py``: see ``deepspan convert train-to-infer``.

python scripts/deepseek3_train2infer.py --input_path trained --output_path served
"""

if __name__ == "__main__":
    import checkout

    checkout.use_checkout()
    from deepspan.scripts.original_conversions import train_to_infer

    raise SystemExit(train_to_infer())
