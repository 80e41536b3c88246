"""`specserve simulate`: how many requests per second meet an objective on a profile.

options.py    what can be asked        device.py    the profile as a pair of engines
question.py   options made whole       capacity.py  the search for the highest rate
answer.py     table and picture        command.py   the command
"""
