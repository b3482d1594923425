"""From a hospital's files to a `Dataset`: `scan` lists images, `read` decodes them. Nothing here leaves the site."""

from client.intake.dataset import Dataset, Form, load, read_form, save
from client.intake.decode import read
from client.intake.records import Record, Scan
from client.intake.refusals import Reason
from client.intake.sources import scan

__all__ = ["Dataset", "Form", "Reason", "Record", "Scan", "load", "read", "read_form", "save", "scan"]
