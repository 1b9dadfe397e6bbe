"""What stands in the help: below the options commands to copy (paragraphs keep their lines, so each is one)."""

EXAMPLES = """Static W8A8 for vLLM Ascend and MindIE, with the options of quant_qwen2_5vl.py:

  vlqc compile --model_path FLOAT --calib_images PICTURES --save_directory OUT --anti_method m2

W8A8 with scales per token; 4 bits per group; MindIE's own layout:

  vlqc compile ... --is_dynamic True

  vlqc compile ... --w_bit 4 --is_dynamic True --is_lowbit True --open_outlier False --group_size 256

  vlqc compile ... --mindie_format

What would come out, and what it would take; options from a file; go on after an interruption:

  vlqc compile ... --plan

  vlqc compile --recipe w8a8.yaml --anti_method m4

  vlqc compile ... --resume"""
GUIDE = """Usual order:

  vlqc compile --model_path FLOAT --calib_images PICTURES --save_directory OUT

  vlqc verify OUT --model_path FLOAT --calib_images PICTURES --locate

  vlqc report OUT

Exit codes: 0 fine, 1 a folder failed verification, 2 something in the input, 70 a fault of vlqc, 130 interrupted.

Tab completes options and values after: vlqc --install-completion"""
BARE = " "  # of an option without a value: typer would show <bool>, and people would write True behind it
