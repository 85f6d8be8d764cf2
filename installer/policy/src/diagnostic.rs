//! What is wrong with a policy file: where, why, and what to do.

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use std::fmt;
use std::ops::Range;

/// The most diagnostics that are drawn: a file with more is not a policy.
const MAX_DRAWN: usize = 50;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    /// The policy is refused.
    Error,
    /// The policy is accepted; its author should look.
    Warning,
}

/// One finding. Its `Display` is one line: `FILE:LINE:COLUMN: error[P002]: message; help`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diagnostic {
    /// Stable code: `P0xx` errors in the file, `P1xx` warnings, `P2xx` tests that fail.
    pub code: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// The file's name as given.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The bytes that are meant.
    pub span: Range<usize>,
    /// What is said beside them; may be empty.
    pub label: String,
    /// What to do; may be empty.
    pub help: String,
    /// Another place that has to do with it.
    pub related: Option<(Range<usize>, String)>,
}

impl Diagnostic {
    /// A finding at `span` of the text `src` in the file called `file`.
    pub(crate) fn new(
        (file, src): (&str, &str),
        severity: Severity,
        code: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
    ) -> Diagnostic {
        let span = clamp(src, span);
        let before = &src[..span.start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Diagnostic {
            code,
            severity,
            message: message.into(),
            file: file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            span,
            label: String::new(),
            help: String::new(),
            related: None,
        }
    }

    pub(crate) fn label(mut self, label: impl Into<String>) -> Diagnostic {
        self.label = label.into();
        self
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help = help.into();
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let Diagnostic {
            file,
            line,
            column,
            code,
            message,
            ..
        } = self;
        write!(f, "{file}:{line}:{column}: {severity}[{code}]: {message}")?;
        if !self.help.is_empty() {
            write!(f, "; {}", self.help)?;
        }
        Ok(())
    }
}

/// Draws `diagnostics` about the text `src`, each with the lines it is about.
pub fn render(src: &str, diagnostics: &[Diagnostic]) -> String {
    let mut text = String::new();
    for diagnostic in diagnostics.iter().take(MAX_DRAWN) {
        let level = match diagnostic.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut annotation = AnnotationKind::Primary.span(clamp(src, diagnostic.span.clone()));
        if !diagnostic.label.is_empty() {
            annotation = annotation.label(diagnostic.label.as_str());
        }
        let mut snippet = Snippet::source(src)
            .path(diagnostic.file.as_str())
            .annotation(annotation);
        if let Some((span, label)) = &diagnostic.related {
            let context = AnnotationKind::Context.span(clamp(src, span.clone()));
            snippet = snippet.annotation(context.label(label.as_str()));
        }
        let title = level.primary_title(diagnostic.message.as_str());
        let mut group = Group::with_title(title.id(diagnostic.code)).element(snippet);
        if !diagnostic.help.is_empty() {
            group = group.element(Level::HELP.message(diagnostic.help.as_str()));
        }
        text += &Renderer::plain().render(&[group]);
        text += "\n\n";
    }
    if diagnostics.len() > MAX_DRAWN {
        let rest = diagnostics.len() - MAX_DRAWN;
        text += &format!("... and {rest} more\n\n");
    }
    text
}

/// `span` inside `src` and on character boundaries, so that no slice of it can panic.
fn clamp(src: &str, span: Range<usize>) -> Range<usize> {
    let floor = |mut at: usize| {
        at = at.min(src.len());
        while !src.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = floor(span.start);
    start..floor(span.end).max(start)
}
