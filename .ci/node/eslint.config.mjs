// The viewers' page: plain modules for browsers of today.
import js from "@eslint/js";
import globals from "globals";

export default [
  { ignores: ["**/third_party/"] },
  js.configs.recommended,
  {
    languageOptions: { ecmaVersion: 2024, sourceType: "module", globals: globals.browser },
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      "eqeqeq": "error",
      "max-lines": ["error", 500],
      "max-lines-per-function": ["error", { max: 60, skipBlankLines: true }],
      "no-eval": "error",
      "no-implied-eval": "error",
      "no-shadow": "error",
      "no-var": "error",
      "no-unused-expressions": ["error", { allowShortCircuit: true }],
      "prefer-const": "error",
    },
  },
];
