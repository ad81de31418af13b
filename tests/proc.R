# Writes proc.json: data sets with ties, and what pROC says of them, for test_metrics.py.
# usage: Rscript tests/proc.R > tests/proc.json   (R packages pROC and jsonlite)
suppressMessages({library(pROC); library(jsonlite)})
data(aSAH, infert)
set.seed(1)
y <- rbinom(117, 1, .52)
ratings <- data.frame(y=y, a=pmin(5, pmax(1, round(rnorm(117, 3+.5*y)))), b=pmin(5, pmax(1, round(rnorm(117, 3+.2*y)))))
z <- rbinom(262, 1, .3)
shared <- rnorm(262)
probs <- data.frame(y=z, a=round(plogis(.4*z+shared+.5*rnorm(262)), 1), b=round(plogis(.2*z+shared+.5*rnorm(262)), 2))
sets <- list(
  aSAH=data.frame(y=as.integer(aSAH$outcome=="Poor"), a=aSAH$s100b, b=as.integer(aSAH$wfns)),
  infert=data.frame(y=infert$case, a=infert$spontaneous, b=infert$induced),
  mtcars=data.frame(y=mtcars$am, a=-mtcars$cyl, b=mtcars$mpg),
  ratings=ratings, probabilities=probs)

figures <- function(d) {
  a <- roc(d$y, d$a, levels=c(0, 1), direction="<", quiet=TRUE)
  b <- roc(d$y, d$b, levels=c(0, 1), direction="<", quiet=TRUE)
  one <- function(r) list(auc=as.numeric(auc(r)), var=var(r, method="delong"), ci=as.numeric(ci.auc(r, method="delong"))[c(1, 3)], ci90=as.numeric(ci.auc(r, method="delong", conf.level=.9))[c(1, 3)])
  t <- roc.test(a, b, method="delong", paired=TRUE)
  u <- roc.test(a, b, method="delong", paired=FALSE)
  list(a=one(a), b=one(b), cov=cov(a, b, method="delong"), paired=list(z=as.numeric(t$statistic), p=t$p.value, ci=as.numeric(t$conf.int)), unpaired=list(z=as.numeric(u$statistic)))
}
cat(toJSON(list(made_with=paste0("R ", getRversion(), ", pROC ", packageVersion("pROC")),
                sets=lapply(sets, function(d) list(data=as.list(d), figures=figures(d)))), digits=NA, auto_unbox=TRUE, pretty=FALSE), "\n")
