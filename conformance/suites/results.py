# Runs one module of Python's own tests and prints a line for each test: MODULE CLASS.NAME RESULT.
import io
import sys
import unittest


class Results(unittest.TestResult):
    def say(self, test, result):
        name = test.id().removeprefix("test." + sys.argv[1] + ".")
        print(sys.argv[1], name.replace(" ", "_"), result, file=out, flush=True)

    def addSuccess(self, test):
        self.say(test, "PASS")

    def addError(self, test, err):
        self.say(test, "FAIL")

    def addFailure(self, test, err):
        self.say(test, "FAIL")

    def addSkip(self, test, reason):
        self.say(test, "SKIP")

    def addExpectedFailure(self, test, err):
        self.say(test, "PASS")

    def addUnexpectedSuccess(self, test):
        self.say(test, "FAIL")


out = sys.stdout
sys.stdout = io.StringIO()  # what tests print
unittest.defaultTestLoader.loadTestsFromName("test." + sys.argv[1]).run(Results())
