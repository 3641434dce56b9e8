"""python -m pybmc"""

from .cli import main

main()
